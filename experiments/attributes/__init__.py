"""Which pictures share a subject, a style or a background? A study on drawings with known ones."""
