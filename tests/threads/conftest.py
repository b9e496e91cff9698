"""`torch.testing.assert_close` imports this when it is first called, which ranks that are threads must not do at once."""

import torch.distributed.tensor  # noqa: F401
