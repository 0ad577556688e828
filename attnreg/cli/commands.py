"""Every command module, imported so that it registers its commands on the app."""

from attnreg.cli import bench, build, db, doctor, explain, plugins, targets, tune, variants

__all__ = ["bench", "build", "db", "doctor", "explain", "plugins", "targets", "tune", "variants"]
