"""Adapters that let other libraries' models run on attnreg; each imports its library only when it is imported."""
