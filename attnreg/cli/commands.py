"""Every command module, imported so that it registers its commands on the app."""

from attnreg.cli import db, doctor, explain, plugins, tune, variants

__all__ = ["db", "doctor", "explain", "plugins", "tune", "variants"]
