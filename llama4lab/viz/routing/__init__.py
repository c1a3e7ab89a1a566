"""Plots of `llama4lab.tables.routing`."""

from llama4lab.viz.routing.alternatives import counterfactual as counterfactual
from llama4lab.viz.routing.alternatives import regret as regret
from llama4lab.viz.routing.cards import expert_card as expert_card
from llama4lab.viz.routing.chains import information as information
from llama4lab.viz.routing.chains import paths as paths
from llama4lab.viz.routing.chains import repetition as repetition
from llama4lab.viz.routing.choices import decisions as decisions
from llama4lab.viz.routing.domains import risk_difference as risk_difference
from llama4lab.viz.routing.domains import specialization as specialization
from llama4lab.viz.routing.expert_pairs import coactivation as coactivation
from llama4lab.viz.routing.expert_pairs import similarity as similarity
from llama4lab.viz.routing.expert_vocabulary import vocabulary as vocabulary
from llama4lab.viz.routing.flow import transitions as transitions
from llama4lab.viz.routing.gates import gate_curve as gate_curve
from llama4lab.viz.routing.importances import importance as importance
from llama4lab.viz.routing.importances import rank_correlation as rank_correlation
from llama4lab.viz.routing.loads import balance as balance
from llama4lab.viz.routing.loads import expert_load as expert_load
from llama4lab.viz.routing.margins import flip_distance as flip_distance
from llama4lab.viz.routing.periods import load_over_time as load_over_time
from llama4lab.viz.routing.stability import drift as drift
from llama4lab.viz.routing.stability import saturation as saturation
from llama4lab.viz.routing.strip import tokens as tokens
from llama4lab.viz.routing.writes import contributions as contributions
from llama4lab.viz.routing.writes import expert_attribution as expert_attribution
