"""Pages about runs, for people who would rather look: one of a run, one that compares several."""
