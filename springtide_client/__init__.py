"""Python client for the HTTP API of a Springtide serving host, with typed responses. It imports no server code."""

from springtide_client.answers import Engagement as Engagement
from springtide_client.answers import Explanation as Explanation
from springtide_client.answers import Interest as Interest
from springtide_client.answers import LeftOutItem as LeftOutItem
from springtide_client.answers import Lookalike as Lookalike
from springtide_client.answers import ModelMetadata as ModelMetadata
from springtide_client.answers import ModelStatus as ModelStatus
from springtide_client.answers import Profile as Profile
from springtide_client.answers import RankedItem as RankedItem
from springtide_client.answers import Ranking as Ranking
from springtide_client.answers import Readiness as Readiness
from springtide_client.answers import Recommendations as Recommendations
from springtide_client.answers import RecommendedItem as RecommendedItem
from springtide_client.answers import SegmentLookalikes as SegmentLookalikes
from springtide_client.answers import SegmentMember as SegmentMember
from springtide_client.answers import SegmentPage as SegmentPage
from springtide_client.answers import SegmentSize as SegmentSize
from springtide_client.answers import ServingHost as ServingHost
from springtide_client.answers import SimilarItem as SimilarItem
from springtide_client.answers import SimilarItems as SimilarItems
from springtide_client.answers import UserSegment as UserSegment
from springtide_client.answers import Version as Version
from springtide_client.client import AsyncClient as AsyncClient
from springtide_client.client import Cap as Cap
from springtide_client.client import Client as Client
from springtide_client.client import ClientError as ClientError
from springtide_client.client import Item as Item
from springtide_client.client import Overloaded as Overloaded
from springtide_client.client import Refused as Refused
from springtide_client.client import Retries as Retries
from springtide_client.client import ServerFailed as ServerFailed
from springtide_client.client import TimedOut as TimedOut
from springtide_client.client import UnexpectedAnswer as UnexpectedAnswer
from springtide_client.client import Unreachable as Unreachable
from springtide_client.client import User as User

__version__ = "0.2.0"
