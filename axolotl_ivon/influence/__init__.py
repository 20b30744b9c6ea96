"""What each training row has done to the mean."""

from .attribution import Influences as Influences
from .attribution import influence as influence
