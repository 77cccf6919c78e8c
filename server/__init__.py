"""The coordinator: federates the study, releases the cohort; never holds a patient row in deployment."""
