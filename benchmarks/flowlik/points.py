"""`Points`: the same as `flowlik.tasks.points`."""

from flowlik.tasks.points import Points as Points
from flowlik.tasks.points import Rows as Rows
from flowlik.tasks.points import chunks as chunks
from flowlik.tasks.points import whole as whole
