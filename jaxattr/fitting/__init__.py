"""What is fitted to the training data before features are final: eigenbases, moments, Hessians."""
