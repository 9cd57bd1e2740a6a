"""Every night: from a repository to published quantized ones, or nothing to do."""
