"""How much each training row shaped the mean."""

from .attribution import Influences as Influences
from .attribution import influence as influence
