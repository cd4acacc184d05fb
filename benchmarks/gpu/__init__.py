"""One run that checks and times everything on a GPU, stage by stage: ``make gpu``."""
