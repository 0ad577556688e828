"""Every command module, imported so that it registers its commands on the app."""

from attnreg.cli import doctor, explain, plugins, variants

__all__ = ["doctor", "explain", "plugins", "variants"]
