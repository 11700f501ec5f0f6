"""What `tokenreel evaluate` is made of: tests of a classifier, probes and searches on frozen features, and their figures."""
