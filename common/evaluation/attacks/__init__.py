"""Attacks on a synthetic cohort by somebody who holds the cohort and knows the study; one attack a file.

Guesses are made from the cohort, the public schema and an explicit random generator alone. They are then counted
against the patients the cohort was learned from, against a control of patients it was not learned from, and against
guesses made without the cohort. Every result is a count of patients (or of predicates, for singling out), un-noised:
what leaves a site is for the caller to decide (privacy.md, section 0). No failed attack is evidence of privacy.
"""
