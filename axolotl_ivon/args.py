"""Today's import path of the YAML keys."""

from .settings.keys import IVONArgs as IVONArgs
