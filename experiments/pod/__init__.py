"""A rehearsal of a TPU pod on one machine: four hosts of two devices each, one of which dies."""
