"""The API: pydantic types and the CustomResourceDefinition made of them."""
