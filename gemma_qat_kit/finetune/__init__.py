"""Fine-tuning: adapters on packed weights, trained on conversations."""

import logging

# peft imports bitsandbytes, which tells everybody without a GPU of a kernel that nothing here would use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
