"""What a person starts: the command line, the jobs, and everything that touches Ray, MLflow or the environment."""
