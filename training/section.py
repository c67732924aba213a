"""What all sections of the settings are made of: ranges of numbers, and a base that is strict."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    """Frozen, and a misspelt key is refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Let a setting that is given another default keep its description, for forms."""
        for name, field in cls.model_fields.items():
            bases = (getattr(base, "model_fields", {}).get(name) for base in cls.__mro__[1:])
            described = (base.description for base in bases if base and base.description)
            field.description = field.description or next(described, None)
        cls.model_rebuild(force=True)
