"""Events, mechanisms and ledgers: what is spent, and against whom (privacy.md, sections 3 and 4)."""
