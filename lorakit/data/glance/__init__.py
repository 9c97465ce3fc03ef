"""A glance at the rows: how many there are and how long, in a fraction of a second, without torch or transformers.

Small sources are read whole, of large ones some rows from the whole length; tokens are counted by the model's own
tokenizer where its file is here, and estimated where it is not.
"""

from lorakit.data.glance.glance import Glance as Glance
from lorakit.data.glance.glance import glance as glance
