"""How a space is walked: the evolution, its history on disk and the loop that joins them to a measurement."""

from genas_plugins.search.budget import BudgetError, CostedSpace, Limits
from genas_plugins.search.dispatch import Dispatch, Task
from genas_plugins.search.evolution import Evolution, NoCandidateError, Proposal, SearchSpace
from genas_plugins.search.history import History, HistoryError, check_records
from genas_plugins.search.in_flight import InFlight, torch_threads
from genas_plugins.search.lines import JsonLines
from genas_plugins.search.loop import candidate_seed, run_search
from genas_plugins.search.pareto import ParetoEvolution
from genas_plugins.search.racing import Race
from genas_plugins.search.record import Record
from genas_plugins.search.sharing import SharedSearch, SharedSearchError

__all__ = [
    "BudgetError",
    "CostedSpace",
    "Dispatch",
    "Evolution",
    "History",
    "HistoryError",
    "InFlight",
    "JsonLines",
    "Limits",
    "NoCandidateError",
    "ParetoEvolution",
    "Proposal",
    "Race",
    "Record",
    "SearchSpace",
    "SharedSearch",
    "SharedSearchError",
    "Task",
    "candidate_seed",
    "check_records",
    "run_search",
    "torch_threads",
]
