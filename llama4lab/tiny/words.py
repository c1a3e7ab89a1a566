"""The word lists that several domains draw from, and the common words that the vocabulary adds to them."""


def _words(text: str) -> list[str]:
    return text.split()


NAMES = _words(
    "Mary John Tom Anna James Lucy Peter Sarah David Emma Paul Laura Mark Alice Robert Julia Simon Helen Daniel Clara "
    "Kevin Nina Martin Rose Oscar Grace Henry Jane Victor Ruth Adam Eva Felix Iris Leo Maria Noah Olivia Samuel Sofia "
    "George Kate Max Sally Frank Lily Jack Diana Bruno Vera"
)

PLACES = _words(
    "store park school office house garden station market museum library beach kitchen hospital restaurant theatre "
    "church bakery farm zoo cafe"
)

OBJECTS = _words(
    "drink book ring key letter ball apple cake map lamp bag coin flower pen basket kite hat cup box gift bone snack "
    "computer necklace ticket guitar shirt knife candle mirror"
)

ANIMALS = _words("dog cat horse cow bird fish mouse bear lion fox sheep goat duck frog snake wolf rabbit tiger")

# Words a reader is likely to type; the random sequences of the induction domain train their embeddings.
COMMON = _words("""
the of and to in a is that it was for on are as with his they at be this from I have or by one had not but what all
were when we there can an your which their said if do will each about how up out them then she many some so these
would other into has more her two like him see time could no make than first been its who now people my made over did
down only way find use may water long little very after words called just where most know get through back much before
go good new write our used me man too any day same right look think also around another came come work three word must
because does part even place well such here take why things help put years different away again off went old number
great tell men say small every found still between name should home big give air line set own under read last never us
left end along while might next sound below saw something thought both few those always looked show large often
together asked house world going want important until form food keep children feet land side without boy once animal
life enough took sometimes four head above kind began almost live page got earth need far hand high year mother light
country father let night picture being study second soon story since white ever paper hard near sentence better best
across during today however sure knew it's try told young sun thing whole hear example heard several change answer room
sea against top turned learn point city play toward five himself usually money seen car morning body upon family later
turn move face door cut done group true half red fish plants living black eat short run book gave order open ground
cold really table remember tree course front space inside ago sad early learned brought close nothing though idea lived
became add become grow yet less wind behind cannot among able dog shown mean English rest perhaps certain six feel
fire ready green yes built special ran full town complete oh person hot anything hold state list stood hundred ten fast
felt kept notice strong ready language model layer expert token image
""")
