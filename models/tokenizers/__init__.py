"""Frame tokenizers: one file each, behind the interface in `base`."""
