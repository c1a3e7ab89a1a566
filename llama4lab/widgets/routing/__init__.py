"""Views of routing to point at: the nouns of `llama4lab.viz.routing`."""

from llama4lab.widgets.routing.alternatives import Counterfactual as Counterfactual
from llama4lab.widgets.routing.cards import ExpertCard as ExpertCard
from llama4lab.widgets.routing.choices import Decisions as Decisions
from llama4lab.widgets.routing.domains import Specialization as Specialization
from llama4lab.widgets.routing.flow import Transitions as Transitions
from llama4lab.widgets.routing.gates import GateCurve as GateCurve
from llama4lab.widgets.routing.loads import ExpertLoad as ExpertLoad
from llama4lab.widgets.routing.token_strip import TokenStrip as TokenStrip
