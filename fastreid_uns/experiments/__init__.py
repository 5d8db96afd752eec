"""Configs trained over seeds: what is run, tuned on validation identities, measured, and said of it."""
