"""The same as `flowlik.evaluation.uses.importance`."""

from flowlik.evaluation.uses.importance import Design as Design
from flowlik.evaluation.uses.importance import Event as Event
from flowlik.evaluation.uses.importance import design_of as design_of
from flowlik.evaluation.uses.importance import effective_share as effective_share
from flowlik.evaluation.uses.importance import rare_events as rare_events
from flowlik.evaluation.uses.importance import tail as tail
from flowlik.evaluation.uses.importance import weighed as weighed
