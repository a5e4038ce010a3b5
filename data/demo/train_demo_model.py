"""Train models/demo from random weights: one command, about an hour and a half on two CPU cores.

    python -m data.demo.train_demo_model --output models/demo_new

The curriculum goes from one fact a passage to fifteen. Passages are generated on the way, all
from the training split of names, values and question phrasings; none is seen twice.
"""
