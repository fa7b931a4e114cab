"""jaxattr: which training examples made the model do this?

What is public is listed in `__init__.pyi`, and imported when it is first asked for: a program that
shows its help, or one module, does not wait for the rest.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.2.0"
__all__ += ["__version__"]
