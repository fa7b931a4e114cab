"""Attribution methods, each a composition of an output function, a projection and a kernel."""
