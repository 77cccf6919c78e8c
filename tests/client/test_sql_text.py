"""What is said about a query before any database sees it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.sql_text import query_problem

GOOD = "select age, sex from patients order by id"


@pytest.mark.parametrize(
    "query",
    [
        GOOD,
        GOOD.upper() + " ;  ; -- done",
        "-- a; comment\n/* one; /* nested */ more */ " + GOOD,
        "with x as (select 1 as id) select * from x ORDER  BY id limit 5",
        "select ';' as a, E'it\\'s; ' as b, 'it''s;' as c, \"a;b\" from t order\nby 1",
        "select $$;$$, $tag$ ; $$ ; $tag$ from t order by 1",
        "select row_number() over (order by a) as n from t union select 1 order by n",
        "select é from t order /* here */ by é",
    ],
)
def test_one_ordered_select(query: str) -> None:
    assert query_problem(query, ordered=True) == ""


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", "is empty"),
        (" ; -- nothing", "is empty"),
        ("select 1; delete from patients", "more than one statement"),
        ("select '\\'; delete from patients; --' order by 1", "more than one statement"),
        ("select $a$ ; $a$ ; drop table t order by 1", "more than one statement"),
        ("delete from patients", "must begin with SELECT"),
        ("(select 1 order by 1)", "must begin with SELECT"),
        ("copy patients to '/tmp/x'", "must begin with SELECT"),
        ("explain analyze select 1 order by 1", "must begin with SELECT"),
        ("select 1", "has no ORDER BY"),
        ("select * from (select 1 order by 1) as x", "has no ORDER BY"),
        ("select 'order by 1' from t -- order by 1", "has no ORDER BY"),
        ("select rank() over (order by a) from t", "has no ORDER BY"),
        ('select "order by" from t', "has no ORDER BY"),
        ("select (1 order by 1", "not closed"),
        ("select 1) order by 1", "was not opened"),
        ("select 'x order by 1", "a quote that does not end"),
        ("select $$x order by 1", "a $ quote that does not end"),
        ("select /* x order by 1", "a comment that does not end"),
    ],
)
def test_anything_else_is_refused_without_quoting_it(query: str, expected: str) -> None:
    found = query_problem(query, ordered=True)
    assert expected in found and (not query.strip(" ;") or query not in found)


def test_a_key_needs_no_order() -> None:
    assert query_problem("select 1", ordered=False) == ""
    assert "more than one" in query_problem("select 1; select 2", ordered=False)


@given(st.text(alphabet="ab ;'\"$-/*()eE\\\n`1", max_size=40))
def test_a_second_statement_after_a_good_query_is_never_missed(text: str) -> None:
    query_problem(text, ordered=True)  # never fails
    problem = query_problem(f"{GOOD}; {text}x", ordered=True)
    only_comment = text.lstrip().startswith("--") and "\n" not in text
    assert problem or only_comment or "--" in text or "/*" in text
