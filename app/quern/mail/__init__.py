"""Mail: compose one message, send it through the operator's relay."""
