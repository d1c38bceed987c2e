"""The same as `flowlik.evaluation.uses.routes`."""

from flowlik.evaluation.uses.routes import routes_of_a_generator as routes_of_a_generator
