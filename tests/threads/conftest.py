"""What `torch.testing.assert_close` imports at its first call: ranks that are threads must not import it at once."""

import torch.distributed.tensor  # noqa: F401
