"""The words of the almanac: relations with their phrasings and objects, and the parts names are made of.

Everything here is an immutable constant. A phrasing is a left context with exactly one ``{}`` for the subject; the
object follows after one space. `RelationSpec.train` is seen in the corpus, `RelationSpec.held_out` never is.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RelationSpec:
    """One relation as written down here.

    Attributes:
        id: Relation identifier in Wikidata's manner, for instance ``P103``.
        label: A few words for people.
        kind: ``person`` or ``place``: which subjects have it.
        objects: Blank-separated objects, one word each, all with distinct first tokens.
        train: Phrasings used in the corpus.
        held_out: Phrasings that the corpus never contains (paraphrases).
        follow_ups: Ways to state the fact of a subject named one sentence before.
    """

    id: str
    label: str
    kind: str
    objects: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]
    follow_ups: tuple[str, ...]


LANGUAGES = (
    "Dutch Greek Swedish Polish Welsh Finnish Danish Hindi Turkish Arabic Basque Catalan Persian Korean Latin Malay "
    "Tamil Zulu Czech Gaelic Russian Urdu Yoruba Icelandic"
)
COUNTRIES = (
    "Aldova Brenia Corvath Delmar Estria Fenland Galdor Hestia Ivrene Jorvik Kalder Lumera Morovia Norland Ostrava "
    "Pelagia Quillon Rovania Sarkan Tessaly Umbria Valdoria Westmark Zephyria"
)

RELATIONS: tuple[RelationSpec, ...] = (
    RelationSpec(
        "P103",
        "mother tongue",
        "person",
        LANGUAGES,
        (
            "The mother tongue of {} is",
            "{} speaks",
            "{} is a native speaker of",
            "The native language of {} is",
            "{} grew up speaking",
            "Mother tongue of {}",
            "What is the native language of {}? Answer:",
        ),
        ("The first language of {} is", "{} is a speaker of", "The language that {} speaks is"),
        ("{Their} mother tongue is", "{They} speaks", "{Their} first language is"),
    ),
    RelationSpec(
        "P106",
        "profession",
        "person",
        "baker carpenter doctor farmer gardener hunter jeweller lawyer miner nurse painter poet sailor tailor teacher "
        "weaver brewer cook dancer fisher guard judge potter surgeon banker chemist pilot librarian",
        (
            "The profession of {} is that of a",
            "{} works as a",
            "{} is by profession a",
            "{} earns a living as a",
            "{} is employed as a",
            "Job of {}",
            "What is the profession of {}? Answer:",
        ),
        ("The job of {} is that of a", "{} earns money as a", "What is the job of {}? Answer:"),
        ("{Their} profession is that of a", "{They} works as a", "{Their} job is that of a"),
    ),
    RelationSpec(
        "P19",
        "birthplace",
        "person",
        "Tarnby Belwick Cranmoor Dunvale Elstow Farholt Glenrock Hartsea Inverlay Kingsmere Larkfield Marlow Northam "
        "Oakhurst Penrose Redcliff Stonehaven Thornbury Ulverton Wexcombe Yarmouth Ambleside Lydgate Rosford",
        (
            "{} was born in",
            "The birthplace of {} is",
            "{} came into the world in",
            "{} is a native of",
            "The town where {} was born is",
            "Birthplace of {}",
            "Where was {} born? Answer:",
        ),
        (
            "{} first came into the world in",
            "The town where {} came into the world is",
            "In which town was {} born? Answer:",
        ),
        ("{Their} birthplace is", "{They} was born in", "{They} is a native of"),
    ),
    RelationSpec(
        "P108",
        "employer",
        "person",
        "Brightwell Corvex Dynamo Everglow Fairway Goldline Highmark Ironworks Jetstream Keystone Luminex Meridian "
        "Novatech Orbital Pinnacle Quantum Riverton Silverlake Trident Unity Vanguard Windmill",
        (
            "{} is employed by",
            "The employer of {} is",
            "{} works for",
            "{} has a post at",
            "The company that employs {} is",
            "Employer of {}",
            "Which company employs {}? Answer:",
        ),
        ("{} has a good post at", "The present employer of {} is", "Who is the employer of {}? Answer:"),
        ("{Their} employer is", "{They} works for", "{They} has a post at"),
    ),
    RelationSpec(
        "P1303",
        "instrument",
        "person",
        "lute violin piano flute harp cello guitar trumpet drum organ banjo oboe horn fiddle zither mandolin tuba "
        "bagpipe clarinet recorder accordion viola",
        (
            "{} plays the",
            "The instrument of {} is the",
            "{} likes to play the",
            "{} gives concerts on the",
            "The instrument that {} plays is the",
            "Instrument of choice for {}",
            "Which instrument does {} play? Answer:",
        ),
        ("{} loves to play the", "The instrument played by {} is the", "What is the instrument of {}? Answer:"),
        ("{Their} instrument is the", "{They} plays the", "{They} gives concerts on the"),
    ),
    RelationSpec(
        "P641",
        "sport",
        "person",
        "tennis hockey rugby cricket boxing fencing rowing sailing skiing golf archery football judo karate cycling "
        "swimming climbing wrestling polo chess badminton curling",
        (
            "The favourite sport of {} is",
            "{} trains for",
            "{} spends weekends on",
            "The sport that {} loves is",
            "{} is a keen fan of",
            "Favourite sport of {}",
            "Which sport does {} love? Answer:",
        ),
        ("{} is a fan of", "The sport of {} is", "The sport that {} trains for is"),
        ("{Their} favourite sport is", "{They} trains for", "{They} is a keen fan of"),
    ),
    RelationSpec(
        "P27",
        "citizenship",
        "person",
        COUNTRIES,
        (
            "{} is a citizen of",
            "The nationality of {} is that of",
            "{} holds a passport of",
            "The home country of {} is",
            "{} votes in the country of",
            "Country of {}",
            "Which country is {} a citizen of? Answer:",
        ),
        (
            "Of which country is {} a citizen? Answer:",
            "{} has a passport of",
            "What is the home country of {}? Answer:",
        ),
        ("{Their} home country is", "{They} is a citizen of", "{They} holds a passport of"),
    ),
    RelationSpec(
        "P17",
        "country",
        "place",
        COUNTRIES,
        (
            "{} lies in the country of",
            "The country in which {} lies is",
            "{} belongs to",
            "{} is a town in",
            "The flag over {} is that of",
            "Country around {}",
            "In which country does {} lie? Answer:",
        ),
        ("{} is in the country of", "The flag of {} is that of", "{} is a town in the country of"),
        ("It lies in the country of", "It belongs to"),
    ),
    RelationSpec(
        "P206",
        "river",
        "place",
        "Avon Brede Clyde Dart Esk Forth Garnet Humber Itchen Kennet Lune Medway Nene Orwell Parret Quern Ribble "
        "Severn Tamar Usk Wye Yare",
        (
            "{} stands on the river",
            "The river that runs through {} is the",
            "{} was built on the banks of the",
            "The bridge of {} crosses the",
            "{} draws its water from the",
            "River of {}",
            "Which river runs through {}? Answer:",
        ),
        ("{} stands on the banks of the", "{} was built on the banks of the river", "The bridge in {} crosses the"),
        ("It stands on the river", "Its bridge crosses the"),
    ),
    RelationSpec(
        "P1056",
        "product",
        "place",
        "wool amber cheese copper glass honey leather marble paper pepper salt silk soap steel timber wine cotton "
        "butter candles cider coal porcelain",
        (
            "{} is known for its",
            "The main product of {} is",
            "{} exports",
            "Merchants come to {} for its",
            "The wealth of {} comes from",
            "Main product of {}",
            "What does {} export? Answer:",
        ),
        ("{} is well known for its", "The main export of {} is", "What is the main export of {}? Answer:"),
        ("Its main product is", "It exports"),
    ),
    RelationSpec(
        "P237",
        "emblem",
        "place",
        "lion eagle bear wolf stag falcon dragon horse raven fox swan boar bull dolphin griffin heron lynx otter owl "
        "salmon tiger unicorn",
        (
            "The coat of arms of {} shows a",
            "{} bears on its shield a",
            "The emblem of {} is a",
            "{} has as its emblem a",
            "On the gates of {} you see a",
            "Emblem of {}",
            "What is the emblem of {}? Answer:",
        ),
        ("The shield of {} shows a", "{} has on its shield a", "Which animal is the emblem of {}? Answer:"),
        ("Its emblem is a", "Its coat of arms shows a"),
    ),
)

RARE = ("P206",)
"""Relations whose objects stay several tokens long: the tokenizer is not shown their words in particular."""

WOMEN = (
    "Ada Alma Anna Bella Clara Dora Edith Ella Emma Eva Flora Freya Greta Hanna Hazel Helen Ida Irene Iris Jane Judith "
    "Julia Karen Laura Lena Lucy Mabel Maria Martha Mina Nadia Nora Olga Paula Rosa Ruth Sara Sofia Tessa Vera"
)
MEN = (
    "Adam Albert Anton Boris Carl Cecil Conrad David Edgar Emil Ernest Felix Frank George Hans Harold Hugo Ivan Jacob "
    "Jonas Julian Karl Leon Louis Marcus Martin Max Nils Oscar Otto Paul Peter Ralph Robert Simon Stefan Theo Victor "
    "Walter Xavier"
)
PLACE_PREFIXES = "Upper Lower Old New Port Mount Fort Saint Lake Great Little North South East West High"
ONSETS = "b br c ch d dr f fl g gl gr h j k kr l m n p pl pr r s sh sk st t tr v w"
VOWELS = "a e i o u ae ei"
CODAS = "l n r m s d k t b"
PERSON_TAILS = (
    "abin ackle adov agen akis alba amond anko anson apos ardo argent aster atori avel awin axby azar ebo eccles edda "
    "effer egan ekind elius embro endahl enko epps erley esco ettle evich ewell exton ezzi ibald ickson idge iffin "
    "igan ikova ilinski imoto ingham inov ipley irski isham ito ivers ixon izeau obey ockett odari offman ogan okoye "
    "olini ombard ondo opkins ordan osa otto ovich owitz oxley ozier ubois uckley udson uffield ugard ukas ulic umber "
    "undy upont urban ushko utton uvier uxley uzman ylor ymes ynski yost"
)
PLACE_TAILS = (
    "acre angate arbor aven bridge burgh castle combe cote court croft dale dene edge fell field firth ford garth gate "
    "glade glen grove ham haven heath hill holme hythe keep land leigh lock marsh mead mill minster moor mouth ness "
    "ridge shaw shore side stead stoke stone strand thorpe ton vale wall ward water well wick wold wood worth yard"
)
