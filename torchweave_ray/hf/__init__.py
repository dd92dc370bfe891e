"""Models that transformers' own modelling code computes, with our paged attention inside."""
