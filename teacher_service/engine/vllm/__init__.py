"""The vLLM engine, in process. The only package that imports vllm."""
