"""`tokenreel bench learn`: a labelled benchmark from packages of the Python index, and the paper's ablations on it."""
