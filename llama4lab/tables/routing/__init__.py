"""Everything about experts: choices, loads, flow between layers, what experts write, and what they are for."""

from llama4lab.tables.routing.cards import ExpertCard as ExpertCard
from llama4lab.tables.routing.cards import expert_card as expert_card
from llama4lab.tables.routing.choices import decisions as decisions
from llama4lab.tables.routing.counterfactuals import counterfactual as counterfactual
from llama4lab.tables.routing.counterfactuals import regret as regret
from llama4lab.tables.routing.domains import risk_difference as risk_difference
from llama4lab.tables.routing.domains import specialization as specialization
from llama4lab.tables.routing.expert_vocabulary import vocabulary as vocabulary
from llama4lab.tables.routing.expert_vocabulary import vocabulary_specialization as vocabulary_specialization
from llama4lab.tables.routing.flow import coactivation as coactivation
from llama4lab.tables.routing.flow import information as information
from llama4lab.tables.routing.flow import paths as paths
from llama4lab.tables.routing.flow import repetition as repetition
from llama4lab.tables.routing.flow import transitions as transitions
from llama4lab.tables.routing.gates import gate_curve as gate_curve
from llama4lab.tables.routing.likeness import similarity as similarity
from llama4lab.tables.routing.loads import balance as balance
from llama4lab.tables.routing.loads import expert_load as expert_load
from llama4lab.tables.routing.margins import flip_distance as flip_distance
from llama4lab.tables.routing.periods import load_over_time as load_over_time
from llama4lab.tables.routing.pruning import importance as importance
from llama4lab.tables.routing.pruning import rank_correlation as rank_correlation
from llama4lab.tables.routing.stability import drift as drift
from llama4lab.tables.routing.stability import saturation as saturation
from llama4lab.tables.routing.writes import contributions as contributions
from llama4lab.tables.routing.writes import expert_attribution as expert_attribution
