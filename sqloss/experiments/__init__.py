"""Work above single trainings: sweeps, and what is measured with the models of runs."""
