"""Which digits taught a small deep network? A study on scikit-learn's handwritten digits."""
