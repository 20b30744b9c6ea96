"""Today's import path of the axolotl plugin."""

from .integrations.axolotl import ConfigError as ConfigError
from .integrations.axolotl import IVONLoRAPlugin as IVONLoRAPlugin
