"""What `/v1/recommendations` and `/v1/items` are sent and answer."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, model_validator


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", str_max_length=10_000)


ItemId = Annotated[str, Field(min_length=1, max_length=512)]


class Event(_Message):
    """Something a user did with an item, named by its id or its title."""

    item_id: ItemId | None = None
    title: str | None = Field(default=None, min_length=1, max_length=2_000)
    timestamp: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="if every event has one, they are put in order by it",
    )

    @model_validator(mode="after")
    def _one_name(self) -> "Event":
        if (self.item_id is None) == (self.title is None):
            raise ValueError("an event has either an item_id or a title")
        return self


HistoryEntry = ItemId | Event


class Filter(_Message):
    """Only items that meet all of these are recommended."""

    category: str | None = Field(
        default=None, min_length=1, description="one of the item's categories"
    )
    brand: str | None = Field(default=None, min_length=1)
    items: list[ItemId] | None = Field(default=None, description="a list of allowed item ids")


class RecommendationRequest(_Message):
    """Whom to recommend to, and how."""

    history: list[HistoryEntry] | None = Field(
        default=None,
        description="oldest first: item ids, titles (where no item has such an id) or events; "
        "may be empty",
    )
    user: str | None = Field(
        default=None,
        min_length=1,
        max_length=512,
        description="a user whom the server knows, by --run or by Think-Ahead; with a history, "
        "that history is the user's",
    )
    since: list[HistoryEntry] = Field(
        default_factory=list, description="what the user has done after the known history"
    )
    k: int = Field(default=10, ge=1, description="how many items; the server has a limit")
    think: StrictBool | Literal["on", "off", "ahead"] = Field(
        default=False,
        description="say why first: on, off, or from thoughts that were prepared for the user",
    )
    exclude: list[ItemId] | None = Field(
        default=None,
        description="item ids that must not come; the history when missing, none when empty",
    )
    filter: Filter | None = None
    beam_width: int | None = Field(
        default=None, ge=1, description="at least k is used; 2 k when missing"
    )
    tree: StrictBool = Field(
        default=False,
        description="tell the beam behind the trace too: the codes that it followed, as a tree",
    )
    facts: StrictBool = Field(
        default=False, description="tell which facts the trace names, and whether they are true"
    )
    stream: StrictBool = Field(
        default=False,
        description="server-sent events: the thought as it is written, then the answer",
    )

    @model_validator(mode="after")
    def _known_user(self) -> "RecommendationRequest":
        if self.history is None and self.user is None:
            raise ValueError("give a history (it may be empty) or a user")
        if self.think == "ahead" and self.user is None:
            raise ValueError('think "ahead" needs the user whom the thoughts were prepared for')
        return self

    @property
    def mode(self) -> Literal["on", "off", "ahead"]:
        """`think` as a word."""
        if self.think == "ahead":
            return "ahead"
        return "on" if self.think in (True, "on") else "off"


class RecommendedItem(BaseModel):
    """One recommended item; `score` is the log-probability of its SID."""

    id: str
    title: str
    score: float
    sid: str


class TraceFact(BaseModel):
    """A fact that the trace names."""

    name: str
    clause: str = Field(description="evidence, jump or turn speak of the history, next of items")
    start: int = Field(description="where in the trace, in Unicode characters")
    end: int
    true: bool = Field(description="borne by the history; announced: by an item of the catalogue")
    history: list[int] = Field(description="places of the items that bear it, from 0, as sent")
    ranks: list[int] = Field(description="of the recommended items that bear it, from 1")


class TreeBranch(BaseModel):
    """A code after a prefix that the beam followed; at a leaf stands an item."""

    code: str
    probability: float = Field(description="of the code among those that may follow its prefix")
    log_prob: float = Field(description="of the prefix with the code")
    id: str | None = Field(default=None, description="of the item at a leaf")
    title: str | None = None
    left: bool = Field(default=False, description="none of its items is among the beam's last")
    children: list["TreeBranch"] = Field(default_factory=list, description="the likeliest first")


class Timings(BaseModel):
    """Milliseconds of each part."""

    queue: float
    thought: float
    beam: float
    total: float


class Ahead(BaseModel):
    """What came of `think: "ahead"`."""

    used: bool
    reason: str | None = Field(default=None, description="why it was not used")
    age_seconds: float | None = None
    new_events: int | None = Field(
        default=None, description="in the history since the thoughts were made"
    )


class Answer(BaseModel):
    """Recommended items, best first, and how they came about."""

    id: str
    object: Literal["recommendations"] = "recommendations"
    created: int
    model: str
    think: Literal["on", "off", "ahead"] = Field(description="what was done")
    trace: str = Field(description="the thought that speaks most for the first item")
    items: list[RecommendedItem]
    timings_ms: Timings
    ahead: Ahead | None = None
    facts: list[TraceFact] | None = Field(
        default=None, description="of `trace`, if asked for and the catalogue is not too large"
    )
    tree: list[TreeBranch] | None = Field(
        default=None, description="the beam behind `trace`, or behind no thought, if asked for"
    )


class NewItem(_Message):
    """What the catalogue says of an item."""

    item_id: ItemId
    title: str = Field(default="", max_length=2_000)
    brand: str = Field(default="", max_length=2_000)
    categories: list[str] = Field(default_factory=list, max_length=100)
    description: str = Field(default="", max_length=10_000)


class ItemsRequest(_Message):
    """Items to add, or to encode again with what is now known of them."""

    items: list[NewItem] = Field(min_length=1)


class RetireRequest(_Message):
    """Items that are not to be recommended any more."""

    ids: list[ItemId] = Field(min_length=1)


class CatalogueItem(BaseModel):
    """An item as the server holds it."""

    id: str
    title: str
    brand: str
    categories: list[str]
    sid: str
    retired: bool = False


class ItemsAnswer(BaseModel):
    """The items that were changed, or found; `catalogue` is how many can be recommended now."""

    object: Literal["items"] = "items"
    items: list[CatalogueItem]
    catalogue: int


class Health(BaseModel):
    """Whether requests are being answered."""

    status: Literal["ok"] = "ok"
    model: str
    items: int


class ErrorDetail(BaseModel):
    """OpenAI's error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """OpenAI's error format."""

    error: ErrorDetail
