"""How far a synthetic cohort resembles the patients, and how useful it is: pure functions of tables."""
