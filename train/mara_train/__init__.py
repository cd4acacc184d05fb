"""Training of the agents that mara_fast decodes with."""
