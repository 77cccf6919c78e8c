"""The hospital: checks its own policy, trains on its own rows and sends only what is accounted for."""
