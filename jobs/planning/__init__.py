"""What a corpus will take, predicted from a sample of it that went through the stages' own code."""
