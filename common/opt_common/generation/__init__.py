"""What `generate` can do, said once for all frameworks: its options, those kept with a model, and their checks."""

from .config import GenerationConfig as GenerationConfig
from .options import Options as Options
from .prefixes import allowed as allowed
from .programs import columns as columns
from .programs import crowded as crowded
from .prompts import Prompt as Prompt
from .prompts import prompt as prompt
from .settings import Sequences as Sequences
from .settings import Settings as Settings
from .settings import check_generate as check_generate
from .settings import merged as merged
from .stops import StopStrings as StopStrings
from .streaming import TextIteratorStreamer as TextIteratorStreamer
from .streaming import TextStreamer as TextStreamer
from .streaming import pieces as pieces
