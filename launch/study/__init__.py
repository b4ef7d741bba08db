"""A controlled comparison of alignment attacks: many small trainings, one table."""
