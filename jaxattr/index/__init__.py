"""The training set, featurised and multiplied by the kernel: built, saved, opened, asked."""
