"""Every command module, imported so that it registers its commands on the app."""

from attnreg.cli import bench, db, doctor, explain, plugins, targets, tune, variants

__all__ = ["bench", "db", "doctor", "explain", "plugins", "targets", "tune", "variants"]
